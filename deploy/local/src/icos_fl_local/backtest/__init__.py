"""``icos-fl backtest``: what forecasts were worth, on recorded traces or on a node that runs."""
