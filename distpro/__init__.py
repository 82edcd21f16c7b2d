"""distpro: knowledge distillation with a searched process."""
