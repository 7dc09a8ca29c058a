"""``icos-fl simulate``: the Flower app on many virtual nodes, on Flower's simulation runtime.

``command`` is the launcher's part. ``processor``, ``virtual_node`` and ``virtual_server`` run in
processes of their own, and they alone import services.
"""
