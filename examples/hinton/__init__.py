"""Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), on images of 8 x 8 pixels.

The paper's experiments took MNIST, a speech corpus and 100 million photographs. These take the 1,797 digits that come
with scikit-learn, networks of a few hundred units, and ten random splits, so that each figure has an error. Run it
with `python -m examples.hinton`; `--help` lists the options.

| file | holds |
|---|---|
| `digits.py` | the images, their splits, shifts and rotations |
| `networks.py` | many small networks trained at once, with `softmax_kd_loss` |
| `experiments.py` | temperature, few data, omitted classes, an ensemble |
| `specialists.py` | specialists on 40 classes that are easily confused |
| `report.py` | standard errors, intervals, and the sentence on each claim of the paper |
| `plots.py` | pictures |
"""
