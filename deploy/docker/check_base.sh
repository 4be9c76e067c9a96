#!/bin/sh
# check_base.sh IMAGE UNPINNED: a build takes a base image by digest only, unless UNPINNED says "allowed" (try-outs).
# A tag may be another image tomorrow; what a digest names cannot change.
set -eu
case "$2" in
  allowed) exit 0 ;;
  refused) ;;
  *) echo "UNPINNED=$2: must be refused or allowed" >&2; exit 2 ;;
esac
digest=${1##*@sha256:}
if [ "$digest" = "$1" ] || [ "${#digest}" -ne 64 ] || [ -n "$(printf %s "$digest" | tr -d 0-9a-f)" ]; then
  echo "BASE=$1: not pinned; say --build-arg BASE=NAME:TAG@sha256:DIGEST, or --build-arg UNPINNED=allowed to try out" >&2
  exit 1
fi
