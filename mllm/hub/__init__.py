"""Load pretrained models: a Hub id, a folder or an embedded part."""
