# remote_words HOSTFILE WORD...: REMOTE_WORDS, the same words for a launch by ssh. To be sourced.
#
# DeepSpeed joins the words of a run with blanks, and the shell of every other machine reads them as a command: of
# `--save 'runs/a;touch x'` it would make two. It puts double quotes around a word with a blank in it, and nothing around
# any other. What is quoted here arrives as it was given; what cannot be is refused.
remote_words() {
  local hostfile=$1 word hosts
  shift
  REMOTE_WORDS=()
  # With a single machine DeepSpeed asks no shell.
  hosts=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$hostfile" | awk '{print $1}' | sort -u | wc -l)
  if [ "$hosts" -lt 2 ]; then
    REMOTE_WORDS=("$@")
    return 0
  fi
  for word in "$PWD" "${MASTER_ADDR:-}" "${MASTER_PORT:-}" "$@"; do
    # pdsh puts the name or the number of the machine in place of these.
    if [[ $word =~ %[hnu%] ]]; then
      echo "pdsh would change ${BASH_REMATCH[0]} in '$word' on every machine; choose another name" >&2
      return 1
    fi
  done
  for word in "$PWD" "${MASTER_ADDR:-}" "${MASTER_PORT:-}"; do
    if [[ $word =~ [^A-Za-z0-9_@%+=:,./-] ]]; then
      echo "the shells of the other machines would read '$word' in their own way; it may have letters, digits and _@%+=:,./- only" >&2
      return 1
    fi
  done
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      REMOTE_WORDS+=("$word")
    elif [[ $word == *' '* ]]; then
      # Inside DeepSpeed's double quotes; it takes care of double quotes itself.
      word=${word//\\/\\\\}
      word=${word//\$/\\\$}
      REMOTE_WORDS+=("${word//\`/\\\`}")
    else
      REMOTE_WORDS+=("'${word//\'/\'\\\'\'}'")
    fi
  done
}
