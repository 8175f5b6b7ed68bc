//! Compiled programs as files, so that the containers of a node that share a profile compile it once. Who makes the bundle names the file
//! after the profile's digest and bounds their number; a file that is not there, or not of this compiler, is no error.

use crate::sys::seccomp::Instruction;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// Begins every file. The digit changes with what the compiler makes of a profile.
const HEADER: [u8; 8] = *b"wl-bpf-1";

/// The kernel takes no longer program (BPF_MAXINSNS).
const INSTRUCTIONS_MAX: usize = 4096;
const INSTRUCTION_BYTES: usize = 8;

/// The program in the file; `None` to compile.
pub(super) fn read(path: &Path) -> Option<Vec<Instruction>> {
    let mut bytes = Vec::new();
    let limit = HEADER.len() + INSTRUCTIONS_MAX * INSTRUCTION_BYTES;
    File::open(path).ok()?.take(limit as u64 + 1).read_to_end(&mut bytes).ok()?;
    let program = bytes.strip_prefix(&HEADER)?;
    let whole = program.len().is_multiple_of(INSTRUCTION_BYTES) && !program.is_empty() && bytes.len() <= limit;
    whole.then(|| program.chunks_exact(INSTRUCTION_BYTES).map(decode).collect())
}

/// Keeps a program, at once or not at all. That it could not be kept costs the next container a compilation and is not told.
pub(super) fn write(path: &Path, program: &[Instruction]) {
    let _ = try_write(path, program);
}

fn try_write(path: &Path, program: &[Instruction]) -> std::io::Result<()> {
    let directory = path.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    // A file without a name: nothing is left of it when the writer is killed.
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let mut file = File::from(open(directory, flags, Mode::RUSR | Mode::WUSR)?);
    let mut bytes = HEADER.to_vec();
    bytes.extend(program.iter().flat_map(encode));
    file.write_all(&bytes)?;
    linkat(file, "", CWD, path, AtFlags::EMPTY_PATH)?;
    Ok(())
}

fn encode(instruction: &Instruction) -> [u8; INSTRUCTION_BYTES] {
    let [low, high] = instruction.code.to_le_bytes();
    let [a, b, c, d] = instruction.k.to_le_bytes();
    [low, high, instruction.jt, instruction.jf, a, b, c, d]
}

fn decode(bytes: &[u8]) -> Instruction {
    let at = |index: usize| bytes.get(index).copied().unwrap_or_default();
    Instruction {
        code: u16::from_le_bytes([at(0), at(1)]),
        jt: at(2),
        jf: at(3),
        k: u32::from_le_bytes([at(4), at(5), at(6), at(7)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_comes_back_and_anything_else_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        assert_eq!(read(&path), None, "no file");
        let program = vec![
            Instruction { code: 0x20, jt: 0, jf: 0, k: 4 },
            Instruction { code: 0x15, jt: 1, jf: 255, k: 0xc000_003e },
            Instruction { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 },
        ];
        write(&path, &program);
        assert_eq!(read(&path), Some(program.clone()));
        write(&path, &program[..1]);
        assert_eq!(read(&path), Some(program), "the first one stays");
        let whole = std::fs::read(&path).unwrap();
        let too_long = [HEADER.as_slice(), &vec![0; (INSTRUCTIONS_MAX + 1) * INSTRUCTION_BYTES]].concat();
        for damaged in [&whole[..whole.len() - 1], &whole[1..], &HEADER, &[], &too_long] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(read(&path), None, "{} bytes", damaged.len());
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing beside it");
    }
}
