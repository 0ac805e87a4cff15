"""The JSON Schemas of the documents."""

from __future__ import annotations

from typing import Any

from .errors import UsageError
from .wording import shown

__all__ = ["schema"]

_DOCUMENTS = ("spec", "plan", "manifest", "report")


def schema(document: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a document: ``spec``, ``plan``, ``manifest`` or ``report``.

    Raises:
        UsageError: if there is no such document.
    """
    if document not in _DOCUMENTS:
        raise UsageError(f'no document is called "{shown(document)}"; one of: {", ".join(_DOCUMENTS)}')
    identity = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:ckptsurg:{document}:1"}
    return identity | _of_models(document)


def _of_models(document: str) -> dict[str, Any]:
    """What pydantic makes of the document's models, which are imported here: of the others there is no need."""
    if document == "spec":
        from .spec import Spec

        return Spec.model_json_schema()
    if document == "plan":
        from .plans import Plan

        return Plan.model_json_schema(mode="serialization")
    if document == "manifest":
        from .manifest import Manifest

        return Manifest.model_json_schema(mode="serialization")
    from pydantic import TypeAdapter

    from .report import DiffReport, Report

    either: TypeAdapter[Report | DiffReport] = TypeAdapter(Report | DiffReport)
    return either.json_schema(mode="serialization")
