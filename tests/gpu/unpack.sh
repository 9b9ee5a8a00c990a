#!/usr/bin/env bash
# Unpacks one archive of prepare_job.py, once: an archive that was unpacked before is left alone.
#
# Usage: unpack.sh ARCHIVE DIR
set -euo pipefail

usage="usage: unpack.sh ARCHIVE DIR"
archive=${1:?$usage} folder=${2:?$usage}
mkdir -p "$folder"
# By content, not by name or time: a copy of the same archive is the same, a new one under an old name is not.
mark=$folder/.$(sha256sum "$archive" | cut -c 1-16).unpacked
[ -e "$mark" ] && exit 0
tar xf "$archive" -C "$folder"
: >"$mark"
echo "unpacked $(basename "$archive") into $folder"
