"""What is read around one optimizer step and in a census, a part for what is read together."""
