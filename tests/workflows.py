"""Workflows and composite actions of GitHub, as far as they run without the service.

Steps that are scripts run in bash, as a runner starts them, with the variables and files that it would give them. Of
actions, those on artifacts are copies of folders; what a step needs from the network, a test does itself beforehand.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
_SHELLS = {"": ["bash", "-e"], "bash": ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]}


@dataclass
class Done:
    """What became of a job or an action: its outputs, its steps' summaries, its log, and which steps were run."""

    ok: bool = True
    code: int = 0
    outputs: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    log: str = ""
    ran: list[str] = field(default_factory=list)


def load(path: Path) -> Any:
    # As YAML 1.2 has it: `on` is text.
    document = yaml.safe_load(path.read_text())
    if True in document:
        document["on"] = document.pop(True)
    return document


class Runner:
    """A machine with a workspace.

    Args:
        place: A folder for all its files.
        artifacts: Where artifacts are kept, by their names.
        actions: The folder of each action that is more than its name: its action.yml, by what stands after ``uses``.
        omitted: Names of steps that need the network.
        prepared: What is in a fresh workspace besides a checkout, and is put into its place with the checkout.
    """

    def __init__(
        self,
        place: Path,
        artifacts: Path | None = None,
        actions: Mapping[str, Path] | None = None,
        omitted: Collection[str] = (),
        prepared: Path | None = None,
    ) -> None:
        self.place, self.artifacts, self.prepared = place, artifacts, prepared
        self.actions, self.omitted = actions or {}, omitted
        self.workspace, self.temp = place / "workspace", place / "temp"
        for folder in (self.workspace, self.temp):
            folder.mkdir(parents=True)

    def action(self, folder: Path, inputs: Mapping[str, str]) -> Done:
        """Run a composite action."""
        document = load(folder / "action.yml")
        assert set(inputs) <= set(document["inputs"])
        given = {name: str(inputs.get(name, one.get("default", ""))) for name, one in document["inputs"].items()}
        done, steps = self._steps(
            document["runs"]["steps"], {"inputs": given, "environment": {"GITHUB_ACTION_PATH": str(folder)}}
        )
        context = {"inputs": given, "steps": steps}
        done.outputs = {name: _filled(one["value"], context) for name, one in document["outputs"].items()}
        return done

    def job(self, job: Mapping[str, Any], context: Mapping[str, Any]) -> Done:
        """Run a job of a workflow; the context has ``needs``, ``inputs``, ``github`` and ``environment``."""
        done, steps = self._steps(job["steps"], context)
        known = {**context, "steps": steps}
        done.outputs = (
            {name: _filled(value, known) for name, value in job.get("outputs", {}).items()} if done.ok else {}
        )
        return done

    def _steps(self, steps: list[Any], context: Mapping[str, Any]) -> tuple[Done, dict[str, Any]]:
        done = Done()
        results: dict[str, Any] = {}
        for number, step in enumerate(steps):
            known = {**context, "steps": results}
            condition = _EXPRESSION.sub(r"\1", str(step.get("if", "success()")))
            name = step.get("name") or step.get("id") or step.get("uses", str(number))
            outputs: dict[str, str] = {}
            if name not in self.omitted and _holds(condition, known, done.ok):
                one = self._step(step, known, name)
                outputs = one.outputs
                done.ran.append(name)
                done.summary += one.summary
                done.log += one.log
                if done.ok and not one.ok:
                    done.ok, done.code = False, one.code
            if "id" in step:
                results[step["id"]] = {"outputs": outputs}
        return done, results

    def _step(self, step: Mapping[str, Any], context: Mapping[str, Any], name: str) -> Done:
        if "run" in step:
            return self._script(step, context)
        # An input is text; of a boolean, that of YAML.
        texts = {
            key: str(one).lower() if isinstance(one, bool) else str(one) for key, one in step.get("with", {}).items()
        }
        given = {key: _filled(text, context) for key, text in texts.items()}
        kind = step["uses"].partition("@")[0]
        if kind in self.actions:
            return self.action(self.actions[kind], given)
        if kind == "actions/checkout":
            assert self.prepared is not None
            shutil.copytree(self.prepared, self.workspace, dirs_exist_ok=True)
            return Done()
        if kind == "actions/setup-python":
            return Done(outputs={"python-path": sys.executable})
        assert self.artifacts is not None
        source, target = self.workspace / given["path"], self.artifacts / given["name"]
        if kind == "actions/download-artifact":
            source, target = target, source
        else:
            assert kind == "actions/upload-artifact", f"{name}: an action that is not known here"
        shutil.copytree(source, target)
        return Done()

    def _script(self, step: Mapping[str, Any], context: Mapping[str, Any]) -> Done:
        assert "${{" not in step["run"], "an expression in a script is code of whoever fills it"
        files = {name: self.temp / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for path in files.values():
            path.write_text("")
        environment = {
            **os.environ,
            **context.get("environment", {}),
            **{key: str(path) for key, path in files.items()},
            "RUNNER_TEMP": str(self.temp),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **{key: _filled(str(value), context) for key, value in step.get("env", {}).items()},
        }
        script = self.temp / "script.sh"
        script.write_text(step["run"])
        command = [*_SHELLS[step.get("shell", "")], str(script)]
        ran = subprocess.run(command, cwd=self.workspace, env=environment, capture_output=True, text=True)
        outputs = _outputs(files["GITHUB_OUTPUT"].read_text())
        summary = files["GITHUB_STEP_SUMMARY"].read_text()
        return Done(ran.returncode == 0, ran.returncode, outputs, summary, ran.stdout + ran.stderr)


def _outputs(text: str) -> dict[str, str]:
    """Lines of ``name=value``, and of ``name<<END`` with the value on the lines up to END."""
    outputs = {}
    lines = iter(text.splitlines())
    for line in lines:
        name, mark, rest = re.fullmatch(r"([\w-]+)(=|<<)(.*)", line).groups()  # type: ignore[union-attr]
        value = [rest]
        if mark == "<<":
            value = []
            while (inner := next(lines)) != rest:
                value.append(inner)
        outputs[name] = "\n".join(value)
    return outputs


def _filled(text: str, context: Mapping[str, Any]) -> str:
    return _EXPRESSION.sub(lambda match: _looked_up(match[1], context), text)


def _looked_up(path: str, context: Mapping[str, Any]) -> str:
    """``steps.verify.outputs.ok``; an output that was not set is empty, whatever else is not known is a slip."""
    value: Any = context
    parts = path.split(".")
    for position, part in enumerate(parts):
        value = value.get(part, "") if position and parts[position - 1] == "outputs" else value[part]
    return str(value)


def _holds(condition: str, context: Mapping[str, Any], ok: bool) -> bool:
    if condition == "success()":
        return ok
    if condition == "!cancelled()":
        return True
    path, value = re.fullmatch(r"([\w.-]+) != '(.*)'", condition).groups()  # type: ignore[union-attr]
    return ok and _looked_up(path, context) != value
