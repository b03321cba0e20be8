"""One's own conversations and images, with one's own CLIP, language model and tokenizer."""
