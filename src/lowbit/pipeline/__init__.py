"""The pipeline: a whole model through a recipe, block by block.

It has a memory plan before it starts and a checkpoint after every block.
"""
