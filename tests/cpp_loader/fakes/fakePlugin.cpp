//! A plugin library that registers itself, as libhstu_trt_plugin.so does; NAME is the creator's.

extern "C" void hstuFakeRegister(char const* name, char const* version, char const* space);

namespace
{

struct Registrar
{
    Registrar()
    {
        hstuFakeRegister(NAME, "1", "hstu");
    }
};

Registrar const registrar;

} // namespace
