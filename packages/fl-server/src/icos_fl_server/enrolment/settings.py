"""Settings of the enrolment service, and of who invites."""

from pathlib import Path

from icos_fl_service.settings import ServiceSettings
from pydantic import Field
from pydantic_settings import SettingsConfigDict

_ADDRESS = r"^\S+:\d{1,5}$"


class EnrolmentSettings(ServiceSettings):
    """``ICOS_FL_ENROLMENT_*``; the paths' defaults are those of ``icos-fl certs controller``."""

    model_config = SettingsConfigDict(env_prefix="ICOS_FL_ENROLMENT_", frozen=True)

    folder: Path = Path("enrolment")
    """Where invitations are kept."""
    gateway: str = Field(default="", pattern=rf"{_ADDRESS}|^$")
    """host:port by which nodes reach the gateway; is in every invitation."""
    superlink: str = Field(default="localhost:8000", pattern=_ADDRESS)
    """host:port of the SuperLink, whose Control API registers nodes."""
    authority: Path = Path("certs/ca.pem")
    """PEM of who signed the certificates of gateway and SuperLink; is in every invitation."""
    certificate: Path = Path("certs/enrolment.pem")
    key: Path = Path("certs/enrolment.key")
    """The service's own; at SIGHUP both are read again."""
    listen_address: str = Field(default="localhost:8090", pattern=_ADDRESS)
