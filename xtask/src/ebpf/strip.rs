//! Takes DWARF away and keeps BTF, which the kernel wants.

use object::build::elf::{Builder, SectionData};

pub fn debug_sections(elf: &[u8]) -> Result<Vec<u8>, object::build::Error> {
    let mut builder = Builder::read(elf)?;
    let mut gone = Vec::new();
    for section in builder.sections.iter_mut() {
        let name = section.name.as_slice();
        if name.starts_with(b".debug_") || name.starts_with(b".rel.debug_") || name == b".comment" {
            section.delete = true;
            gone.push(section.id());
        }
    }
    for symbol in builder.symbols.iter_mut() {
        if symbol.section.is_some_and(|section| gone.contains(&section)) {
            symbol.delete = true;
        }
    }
    // A relocation section whose target is gone cannot be written.
    for section in builder.sections.iter_mut() {
        let of_gone = section.sh_info_section.is_some_and(|target| gone.contains(&target));
        if of_gone && matches!(section.data, SectionData::Relocation(_)) {
            section.delete = true;
        }
    }
    // LLVM keeps section names and symbol names in one table; the writer wants a table of each.
    if !builder.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = builder.sections.add();
        names.name = b".shstrtab".as_slice().into();
        names.sh_type = object::elf::SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    builder.delete_orphans();
    builder.delete_unused_versions();
    let mut out = Vec::new();
    builder.write(&mut out)?;
    Ok(out)
}
