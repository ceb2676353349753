"""Telling the administrator from the token that a request carries, without knowing the admin token itself."""

from __future__ import annotations

import hashlib
import hmac


def derive_viewer_token(admin_token: str) -> str:
    """The token that may look at the admin API and change nothing. It follows from the admin token, so there is nothing
    more to configure, and nobody gets from it to the admin token."""
    return hmac.new(admin_token.encode("utf-8", "replace"), b"shoal viewer", hashlib.sha256).hexdigest()


def is_admin(given_token: str, viewer_token: str | None) -> bool:
    """Whether given_token is the admin token that viewer_token follows from. None: there is no controller."""
    return viewer_token is not None and hmac.compare_digest(derive_viewer_token(given_token), viewer_token)
