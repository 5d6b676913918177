"""Other ways to do the same fine-tuning, each a script of its own. They share no code with the project."""
