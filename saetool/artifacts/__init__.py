"""The only code that touches safetensors, JSON, hashes and ``os.replace``."""
