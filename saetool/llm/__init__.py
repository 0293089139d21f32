"""Language models as services: text in, text or probabilities out. Knows nothing of latents or files of results."""
