"""A shell script that times `.pte` files on an Android phone, with adb and ExecuTorch's `executor_runner`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchslim.artifact.times import TIMES, TIMES_FILE

# sh on the machine that the phone is connected to; nothing runs on the phone but the runner
_SCRIPT = """#!/bin/sh
# Times the programs of this folder in turn on the Android phone that adb finds, and writes {file}:
#   sh phone.sh EXECUTOR_RUNNER [ROUNDS] [THREADS] [CALLS]
# EXECUTOR_RUNNER: ExecuTorch's runner, built with XNNPACK for the phone. A round calls each program CALLS times in
# one process; its time is their mean, the first calls included. Give ROUNDS and THREADS as numbers.
set -eu
runner=${{1:?name the executor_runner that was built for the phone}}
rounds=${{2:-20}} threads=${{3:-}} calls=${{4:-50}}
for number in "$rounds" "${{threads:-1}}" "$calls"; do
    case $number in *[!0-9]* | 0) echo "rounds, threads and calls must be whole numbers above 0" >&2; exit 2 ;; esac
done
cd "$(dirname "$0")"
there=/data/local/tmp/torchslim-$$
work=$(mktemp -d)
trap 'rm -r "$work"; adb shell rm -r "$there" </dev/null' EXIT
adb shell mkdir -p "$there" </dev/null
adb push "$runner" "$there/executor_runner" >/dev/null
adb push {files} "$there/" >/dev/null
adb shell chmod 755 "$there/executor_runner" </dev/null
# time_one NUMBER FILE INPUTS: appends milliseconds of a call
time_one() {{
    answer=$(adb shell "cd $there && ./executor_runner --model_path=$2 --inputs=$3 --num_executions=$calls \\
        ${{threads:+--cpu_threads=$threads}} 2>&1" </dev/null) || true
    total=$(printf '%s\\n' "$answer" | sed -n 's/.*executed successfully [0-9]* time(s) in \\([0-9.]*\\) ms.*/\\1/p')
    if [ -z "$total" ]; then printf '%s\\n' "$answer" >&2; echo "$2 did not run on the phone" >&2; exit 1; fi
    if [ -s "$work/$1" ]; then printf ', ' >>"$work/$1"; fi
    echo "$total $calls" | awk '{{ printf "%.6f", $1 / $2 }}' >>"$work/$1"
}}
round=0
while [ "$round" -lt "$rounds" ]; do
{calls}
    round=$((round + 1))
done
# text NAME: a property of the phone without characters that JSON or a terminal would read
text() {{ adb shell getprop "$1" </dev/null | tr -cd 'A-Za-z0-9 ._-' | cut -c 1-100; }}
model=$(text ro.product.model) chip=$(text ro.soc.model)
{{
    printf '{{"format": "{format}", "version": 1, "machine": {{"processor": "%s", "architecture": "%s", ' \\
        "${{model:-a phone}}${{chip:+, $chip}}" "$(text ro.product.cpu.abi)"
    printf '"cores": null, "system": "Android %s"}}, "programs": [' "$(text ro.build.version.release)"
{rows}
    printf ']}}\\n'
}} >"$work/{file}"
mv "$work/{file}" {file}
echo "$PWD/{file}"
"""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A program that the script times.

    Args:
        about: its name, digest, runtime and inputs, as in times.json.
        file: its `.pte`.
        inputs: files with the bytes of its inputs, in order.
    """

    about: Mapping[str, Any]
    file: str
    inputs: Sequence[str]


def phone_script(programs: Sequence[Timed]) -> bytes:
    """The script for the programs of a pack; names of files are those that the pack gives, digits and letters."""
    files = [name for program in programs for name in (program.file, *program.inputs)]
    calls, rows = [], []
    for number, program in enumerate(programs):
        calls.append(f"    time_one {number} {program.file} {','.join(program.inputs)}")
        about = {key: value for key, value in program.about.items() if key != "threads"}
        head = json.dumps({**about, "largest_difference": None})[:-1]  # its end follows: threads and times
        comma = ", " if number else ""
        rows.append(
            f'    printf \'%s%s, "threads": %s, "ms": [%s]}}\' {shlex.quote(comma)} {shlex.quote(head)} '
            f'"${{threads:-null}}" "$(cat "$work/{number}")"'
        )
    return _SCRIPT.format(
        files=" ".join(files), calls="\n".join(calls), rows="\n".join(rows), format=TIMES, file=TIMES_FILE
    ).encode()
