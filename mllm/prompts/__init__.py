"""Turn interleaved text and images into token ids."""
