"""The Flower ClientApp of a node: trains, evaluates and forecasts on the node's own sequences."""
