"""The kinds of closed form, each found by the part it fits; what every one is: `mllm.fits.base`."""
