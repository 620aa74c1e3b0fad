"""Optimizer, step and loop. What is learned and how it is measured per step; evaluations are another room."""
