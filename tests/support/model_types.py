"""The families of models that most tests try, by transformers' names."""

MODEL_TYPES = ("llama", "mistral", "qwen3", "gpt2")
