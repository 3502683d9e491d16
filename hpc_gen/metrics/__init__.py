"""Metrics of image sets: feature extractors, Frechet and kernel distances, precision and recall, inception score."""
