"""Training and testing classifiers: settings and recipes, data, batches, the loop, checkpoints, evaluation.

The names that people use are `vggfeat.train`, `vggfeat.evaluate`, `vggfeat.recipe` and `vggfeat.TrainConfig`.
"""
