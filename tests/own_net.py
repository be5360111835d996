"""A file of somebody's own models, as text; see tests/models/test_models_own.py."""

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 8, num_classes: int = 3):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, num_classes)
    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))

def fixed():
    return Net(4, 7)

def broken():
    return nn.Linear("many", 1)

def wrong():
    return "no module"

number = 5
"""
