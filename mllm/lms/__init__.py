"""What language models are made of and run by; the model itself: `mllm.lms.language_model`."""
