"""Settings of the page, from the environment."""

from pathlib import Path
from typing import Self

from icos_fl_service.security import SecuredSettings, is_loopback
from icos_fl_service.web import check_readers
from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from icos_fl_server.settings import RunConfig


class PageSettings(SecuredSettings):
    """``ICOS_FL_PAGE_*``, read once at the start."""

    model_config = SettingsConfigDict(
        env_prefix="ICOS_FL_PAGE_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    listen_address: str = Field(default="127.0.0.1:8091", pattern=r"^\S+:\d{1,5}$")
    """host:port to serve on; port 0 takes a free one. What other machines reach needs TOKENS."""
    runs: Path = Path(RunConfig.model_fields["result_dir"].default)
    """result-dir of a run, or a folder of such."""
    superlink: str = Field(default="", pattern=r"^(\S+:\d{1,5})?$")
    """host:port of the SuperLink, which knows who is online; empty: that is not told."""
    authority: Path | None = None
    """PEM of who signed the SuperLink's certificate; without it there is no TLS."""

    @model_validator(mode="after")
    def _for_whom(self) -> Self:
        check_readers(self.listen_address, self.tokens)
        if self.superlink and self.authority is None and not is_loopback(self.superlink):
            raise ValueError(
                f"the SuperLink at {self.superlink} is on another machine: give AUTHORITY, who "
                "signed its certificate"
            )
        return self
