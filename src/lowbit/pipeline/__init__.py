"""The pipeline: a whole model through a recipe, block by block, with a memory plan and a checkpoint after every block."""
