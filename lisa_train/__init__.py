"""Train with LoRA, LISA or full fine-tuning, and record what every layer did."""
