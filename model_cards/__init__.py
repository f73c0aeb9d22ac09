"""The template of the model cards, and cards of real runs; installed as `agr_hf.model_cards`."""
