#!/bin/sh
# install.sh BIN ENVIRONMENT WORDS...: `pip install WORDS...` into that environment, by the uv in BIN where it can (seconds
# instead of a minute), else by the pip in BIN. uv reads no pip.conf: pip says where packages come from.
set -eu
bin=$1
environment=$2
shift 2

settings=$("$bin/pip" config list)

# Values of one setting, from files and environment: `global.find-links='/a /b'` or `:env:.find-links='/a'`.
setting() {
  printf '%s\n' "$settings" | sed -n "s/^\(global\|install\|:env:\)\.$1='\(.*\)'\$/\2/p" | sed 's/\\n/ /g'
}

options=
for value in $(setting index-url); do options="$options --default-index $value"; done
for value in $(setting extra-index-url); do options="$options --extra-index-url $value"; done
for value in $(setting find-links); do options="$options --find-links $value"; done

# The best of all places, as pip takes it: uv's own way would be the first place that knows the name.
# shellcheck disable=SC2086
if [ -x "$bin/uv" ] && UV_INDEX_STRATEGY=unsafe-best-match \
    "$bin/uv" pip install --quiet --python "$environment/bin/python" $options "$@"; then
  exit 0
fi
exec "$bin/pip" --python "$environment/bin/python" install --quiet --disable-pip-version-check "$@"
