"""Forecasts of one metric on a node, in numpy alone: nothing here may import torch."""

from icos_fl_client.forecasting.combination import Combination, Forecast
from icos_fl_client.forecasting.forecasters import Anchors, Forecaster, Steps
from icos_fl_client.forecasting.history import History
from icos_fl_client.forecasting.memory import Memory

__all__ = ["Anchors", "Combination", "Forecast", "Forecaster", "History", "Memory", "Steps"]
