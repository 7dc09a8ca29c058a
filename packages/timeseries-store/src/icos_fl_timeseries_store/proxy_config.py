"""What dataClay's proxy puts before its calls: nothing yet.

Without this module, the proxy would run whatever ``proxy_config.py`` lies in the folder that it is
started from. dataClay's own ``jwt_validation`` is no protection: its secret is in its source.
"""

from typing import Any

interceptors: list[Any] = []
middleware_metadata: list[Any] = []
middleware_backend: list[Any] = []
