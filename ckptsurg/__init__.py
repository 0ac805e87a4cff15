"""Declarative surgery on model checkpoints, with proof that frozen weights stayed frozen.

Data flows one way; each module knows only those further down in its line or below.

    cli, pytest_plugin           arguments in, rendering out
    testing                      assertions for tests
    training                     the public functions on live models
    api, proofs, drafts          those on checkpoints
      coercing                       paths or objects taken alike
    formats, integrations        how files, and how live models, become named tensors
      frameworks                     what torch and Keras hold in memory
    inspection, schemas          what a checkpoint holds; what each document may say
      drafting                       a spec to begin with: what is the head, what is numbered
    preparing                    a plan with all that belongs to it
    rewriting, verifying, diffing  carry a plan out; prove that frozen tensors have their bits
    summaries                    what a verify came to, for the pages of a pipeline
    attesting                      statements of both, for others to sign
      baselines, counterparts        the published tensors; what stands for a manifest's, against its records
      gathering, settling, causes    why one moved: the evidence, and what it settles
      comparing, traits, renaming    two versions of a tensor, and in which way they differ; two names of one
      config, config_checks          config.json: its edits, and where it does not say what the tensors are
      writing, layout, publishing    who brings bytes to an output; where they go; how it becomes visible
      targets, claiming, journal     where an output may go; one run at a time; what is done of it
      staged_folder                  the folder that files of an output are made in
      ranks, dealing                 processes that do one job; how its bytes are dealt out to them
      making, describing             tensors that are drawn or cast; the manifest's records
      grafting, casting              a base with another's tensors; values in another dtype
      reading, copying               bytes are read in threads; and written, or shared
      parallel, disk, metering       threads; what changes a disk; how far along
      moments, initializers, random_bits  named values, the same for good
    planning                     spec x headers -> one action for every tensor
      claims, draws, takeovers       which rule has which tensor; what is drawn; what is cast, grafted, renamed
      scale_groups, output_names     weights with their scales; what tensors are called in the output
      findings                       all that is wrong, gathered
      checking, explaining           a spec without a checkpoint; why a tensor has its fate
      selectors, matching, patterns  which tensors a pattern selects
      trees, layers                  names as a tree; where tensors stand in a model
      defaults                       what ``default`` draws
    spec, plans, manifest, report    the four documents, and rules; documents, texts and parsing take them strictly
    header, checkpoints          the safetensors header, and files held open
      containment                    files of a folder that are in it, links followed
    tensors, errors, wording     what all others speak of
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import convert as convert
    from .api import explain as explain
    from .api import inspect as inspect
    from .api import make_manifest as make_manifest
    from .api import plan as plan
    from .api import rewrite as rewrite
    from .api import write_manifest as write_manifest
    from .drafts import draft_spec as draft_spec
    from .errors import CheckpointError as CheckpointError
    from .errors import CkptsurgError as CkptsurgError
    from .errors import DocumentError as DocumentError
    from .errors import FreezeError as FreezeError
    from .errors import FrozenWeightsChanged as FrozenWeightsChanged
    from .errors import ManifestError as ManifestError
    from .errors import PeerFailed as PeerFailed
    from .errors import SpecError as SpecError
    from .errors import SystemFailure as SystemFailure
    from .errors import UsageError as UsageError
    from .formats import open_checkpoint as open_checkpoint
    from .manifest import Manifest as Manifest
    from .manifest import load_manifest as load_manifest
    from .plans import Plan as Plan
    from .proofs import attest as attest
    from .proofs import diff as diff
    from .proofs import verify as verify
    from .report import DiffReport as DiffReport
    from .report import Report as Report
    from .spec import Spec as Spec
    from .spec import load_spec as load_spec
    from .training import freeze as freeze
    from .training import watch as watch

_HOMES = {
    "CheckpointError": "errors",
    "CkptsurgError": "errors",
    "DiffReport": "report",
    "DocumentError": "errors",
    "FreezeError": "errors",
    "FrozenWeightsChanged": "errors",
    "Manifest": "manifest",
    "ManifestError": "errors",
    "PeerFailed": "errors",
    "Plan": "plans",
    "Report": "report",
    "Spec": "spec",
    "SpecError": "errors",
    "SystemFailure": "errors",
    "UsageError": "errors",
    "attest": "proofs",
    "convert": "api",
    "diff": "proofs",
    "draft_spec": "drafts",
    "explain": "api",
    "freeze": "training",
    "inspect": "api",
    "load_manifest": "manifest",
    "load_spec": "spec",
    "make_manifest": "api",
    "open_checkpoint": "formats",
    "plan": "api",
    "rewrite": "api",
    "verify": "proofs",
    "watch": "training",
    "write_manifest": "api",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
