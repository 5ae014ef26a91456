#!/usr/bin/env bash
# Regenerates the committed gRPC stubs from protos/. tests/architecture/test_stub_drift.py runs it into a temporary folder.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-"$top/protos"}
bin=${VIRTUAL_ENV:-"$top/.venv"}/bin
mapfile -t files < <(cd "$top/protos" && find trimtab_protos -name '*.proto' | sort)
cd "$top/protos"
PATH="$bin:$PATH" "$bin/python" -m grpc_tools.protoc -I . \
  --python_out="$out" --grpc_python_out="$out" \
  --mypy_out="$out" --mypy_grpc_out="$out" "${files[@]}"
