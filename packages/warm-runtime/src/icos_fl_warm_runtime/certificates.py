"""Renewed certificates, without a stop: uvicorn reads them at a start alone."""

import logging
import signal
import ssl
from typing import Any

import uvicorn

_log = logging.getLogger("flwr")


def renew_at_sighup() -> None:
    """Have uvicorn's servers that start in this process read their certificates again at SIGHUP.

    New connections get the new one; a pair that does not fit is refused with a warning. To be
    called in the main thread.
    """
    startup = uvicorn.Server.startup
    served: list[uvicorn.Config] = []

    async def note_and_startup(self: uvicorn.Server, *args: Any, **kwargs: Any) -> None:
        served.append(self.config)
        await startup(self, *args, **kwargs)

    def take_over(*_: object) -> None:
        for config in served:
            if config.ssl and config.ssl_certfile:
                _read_again(config.ssl, config.ssl_certfile, config.ssl_keyfile)

    uvicorn.Server.startup = note_and_startup  # type: ignore[method-assign]
    signal.signal(signal.SIGHUP, take_over)


def _read_again(context: ssl.SSLContext, *files: Any) -> None:
    try:
        # A pair that does not fit would be left half loaded.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files)
        context.load_cert_chain(*files)
        _log.info("New connections get the certificate in %s", files[0])
    except OSError as error:  # and ssl.SSLError
        _log.warning("The old certificate goes on, %s and %s: %s", *files, error)
