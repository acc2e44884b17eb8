"""Model families, one file per Hugging Face `model_type`, found by that name."""
