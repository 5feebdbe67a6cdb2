#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <vector>

namespace emulation {
namespace {

template <class T>
std::vector<T> read(std::ifstream& file, uint64_t offset, uint64_t bytes) {
  std::vector<T> items(bytes / sizeof(T));
  file.seekg(static_cast<std::streamoff>(offset));
  file.read(reinterpret_cast<char*>(items.data()),
            static_cast<std::streamsize>(items.size() * sizeof(T)));
  return file ? items : std::vector<T>{};
}

// The full symbol table of the file, which unlike the dynamic one has local functions too.
std::string mangled_name(const char* path, uint64_t address) {
  std::ifstream file(path, std::ios::binary);
  const auto headers = read<Elf64_Ehdr>(file, 0, sizeof(Elf64_Ehdr));
  if (headers.empty() || std::memcmp(headers[0].e_ident, ELFMAG, SELFMAG) != 0) return {};
  if (headers[0].e_ident[EI_CLASS] != ELFCLASS64) return {};
  const auto sections =
      read<Elf64_Shdr>(file, headers[0].e_shoff, headers[0].e_shnum * sizeof(Elf64_Shdr));
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB || section.sh_link >= sections.size()) continue;
    for (const auto& symbol : read<Elf64_Sym>(file, section.sh_offset, section.sh_size)) {
      if (symbol.st_value != address || ELF64_ST_TYPE(symbol.st_info) != STT_FUNC) continue;
      file.seekg(static_cast<std::streamoff>(sections[section.sh_link].sh_offset + symbol.st_name));
      std::string name;
      std::getline(file, name, '\0');
      return name;
    }
  }
  return {};
}

// "void (anonymous namespace)::pool<float, 4>(Args)" becomes "pool<float, 4>".
std::string shorten(std::string name) {
  for (size_t at; (at = name.find("(anonymous namespace)::")) != std::string::npos;) {
    name.erase(at, std::strlen("(anonymous namespace)::"));
  }
  size_t begin = 0, end = 0;
  for (int depth = 0; end < name.size(); ++end) {
    if (name[end] == '<') ++depth;
    if (name[end] == '>') --depth;
    if (depth == 0 && name[end] == '(') break;
    if (depth == 0 && (name[end] == ' ' || name[end] == ':')) begin = end + 1;
  }
  return name.substr(begin, end - begin);
}

}  // namespace

std::string function_name(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0) return {};
  const uint64_t address =
      reinterpret_cast<uint64_t>(function) - reinterpret_cast<uint64_t>(info.dli_fbase);
  const std::string mangled = mangled_name(info.dli_fname, address);
  if (mangled.empty()) return {};
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = text == nullptr ? mangled : shorten(text);
  std::free(text);
  return name;
}

}  // namespace emulation
