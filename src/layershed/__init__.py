"""Training-aware layer dropping for transformers on PyTorch Lightning."""
