#!/bin/sh
# gpu_bench --probe names the device, or says that there is none and ends with 3.
said=$("$1" --probe 2>&1)
code=$?
echo "$said"
case $code in
  0) echo "$said" | grep -q '"uuid":"GPU-' ;;
  3) echo "$said" | grep -q 'no device' ;;
  *) exit 1 ;;
esac
