"""Why a node is not taken in."""

from enum import Enum


class Reason(Enum):
    """Its name for programs, and the HTTP status that it comes with."""

    REQUEST_UNUSABLE = ("request-unusable", 400)
    REQUEST_TOO_LARGE = ("request-too-large", 413)
    KEY_UNUSABLE = ("key-unusable", 400)
    CLOCK_OFF = ("clock-off", 409)
    INVITATION_UNKNOWN = ("invitation-unknown", 403)
    INVITATION_EXPIRED = ("invitation-expired", 403)
    INVITATION_USED = ("invitation-used", 409)
    NAME_IN_USE = ("name-in-use", 409)
    KEY_IN_USE = ("key-in-use", 409)
    KEY_REMOVED = ("key-removed", 409)
    SUPERLINK_AWAY = ("superlink-away", 503)

    def __init__(self, label: str, status: int) -> None:
        self.label = label
        self.status = status


class Refused(Exception):
    """The message is one line for people, with the cure."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
