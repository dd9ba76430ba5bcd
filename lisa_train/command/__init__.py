"""`lisa-train`: arguments, settings, data, recipes, and the demo."""
