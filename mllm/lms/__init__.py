"""Language models (`mllm.lms.language_model`): their tokenizer, decoding, new tokens and runners."""
