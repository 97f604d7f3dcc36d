"""Clients of the HTTP server, for programs without the model: see docs/client.md.

result    what the server sent: reasoning, boxes, scores, masks
request   forms, retries, errors
client    Client and AsyncClient
"""

from coprs_deploy.client.client import AsyncClient, Client
from coprs_deploy.client.result import RemotePrior, RemoteResult
from coprs_deploy.policy import TextDelta

__all__ = ["AsyncClient", "Client", "RemotePrior", "RemoteResult", "TextDelta"]
