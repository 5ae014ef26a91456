"""Tokens: shown once, stored hashed, always with an end."""

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Token, User
from trimtab_controller.services.authorise import secret_hash, token_text
from trimtab_controller.store import identity
from trimtab_protos.errors import Conflict, NotFound

DEFAULT_LIFETIME = timedelta(days=90)
MAX_LIFETIME_DAYS = 400
# Somebody who forgets to keep tokens makes new ones; this many is a script gone wrong.
MAX_PER_USER = 100


@dataclass(frozen=True, slots=True)
class NewToken:
    token: Token
    secret: str


def create(session: Session, user: User, *, name: str, lifetime: timedelta, now: datetime) -> NewToken:
    """Return a token of the user; its secret is nowhere else. Conflict beyond MAX_PER_USER."""
    if len(identity.tokens_of(session, user.id)) >= MAX_PER_USER:
        raise Conflict("too-many-tokens", f"{user.name} has {MAX_PER_USER} tokens already; delete some first")
    secret = secrets.token_urlsafe(32)
    token = identity.insert_token(
        session,
        token_id=mint("tok"),
        user_id=user.id,
        name=name,
        secret_sha256=secret_hash(secret),
        expires_at=now + lifetime,
        now=now,
    )
    return NewToken(token, token_text(token.id, secret))


def revoke(session: Session, user: User, token_id: str, *, now: datetime) -> None:
    """End a token at once. NotFound where the user has none of that id."""
    if not identity.revoke_token(session, user_id=user.id, token_id=token_id, now=now):
        raise NotFound("token-not-found", f"user {user.name} has no token {token_id}")
