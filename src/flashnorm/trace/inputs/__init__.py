"""What a model is traced with: calls of its methods, and numbers where its code computes with numbers."""

from flashnorm.trace.inputs.calls import ExampleCall, example_calls
from flashnorm.trace.inputs.layouts import Arguments
from flashnorm.trace.inputs.numbers import ListsOfItems, MixedDevices

__all__ = ["Arguments", "ExampleCall", "ListsOfItems", "MixedDevices", "example_calls"]
