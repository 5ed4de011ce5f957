"""Training after the drop: LoRA, distillation, and the optimizers that follow."""
