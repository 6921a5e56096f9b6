"""Datasets made of datasets: chosen, merged, relabelled, split, laid out for GR00T. By tools/edit_dataset.py."""
