#include "ops/cc/redis_tls.h"

#include <dlfcn.h>

#include <algorithm>
#include <climits>

namespace qianmo {
namespace {

// Of OpenSSL's headers, the same from 1.1 on.
constexpr int kVerifyPeer = 1;
constexpr int kSetHostName = 55;
constexpr int kErrorWantRead = 2;
constexpr long kVerified = 0;

struct OpenSsl {
  void* (*TLS_client_method)();
  void* (*SSL_CTX_new)(void*);
  void (*SSL_CTX_free)(void*);
  int (*SSL_CTX_load_verify_locations)(void*, const char*, const char*);
  int (*SSL_CTX_set_default_verify_paths)(void*);
  void (*SSL_CTX_set_verify)(void*, int, void*);
  void* (*SSL_new)(void*);
  void (*SSL_free)(void*);
  void (*SSL_set_bio)(void*, void*, void*);
  void (*SSL_set_connect_state)(void*);
  int (*SSL_do_handshake)(void*);
  int (*SSL_get_error)(void*, int);
  long (*SSL_get_verify_result)(void*);
  int (*SSL_read)(void*, void*, int);
  int (*SSL_write)(void*, const void*, int);
  int (*SSL_set1_host)(void*, const char*);
  long (*SSL_ctrl)(void*, int, long, void*);
  void* (*BIO_new)(void*);
  void* (*BIO_s_mem)();
  int (*BIO_read)(void*, void*, int);
  int (*BIO_write)(void*, const void*, int);
  size_t (*BIO_ctrl_pending)(void*);
  unsigned long (*ERR_get_error)();
  void (*ERR_error_string_n)(unsigned long, char*, size_t);
  void (*ERR_clear_error)();
  const char* (*X509_verify_cert_error_string)(long);
};

// Null when OpenSSL is not installed.
const OpenSsl* Load() {
  static const OpenSsl* const loaded = []() -> const OpenSsl* {
    void* library = nullptr;
    for (const char* name : {"libssl.so.3", "libssl.so.1.1"}) {
      // Deeply bound: a server may export BoringSSL's functions of these names.
      library = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
      if (library != nullptr) break;
    }
    if (library == nullptr) return nullptr;
    auto* const ssl = new OpenSsl;
    bool whole = true;
    const auto find = [library, &whole](auto* function, const char* name) {
      *reinterpret_cast<void**>(function) = dlsym(library, name);
      whole = whole && *function != nullptr;
    };
#define FIND(name) find(&ssl->name, #name)
    FIND(TLS_client_method);
    FIND(SSL_CTX_new);
    FIND(SSL_CTX_free);
    FIND(SSL_CTX_load_verify_locations);
    FIND(SSL_CTX_set_default_verify_paths);
    FIND(SSL_CTX_set_verify);
    FIND(SSL_new);
    FIND(SSL_free);
    FIND(SSL_set_bio);
    FIND(SSL_set_connect_state);
    FIND(SSL_do_handshake);
    FIND(SSL_get_error);
    FIND(SSL_get_verify_result);
    FIND(SSL_read);
    FIND(SSL_write);
    FIND(SSL_set1_host);
    FIND(SSL_ctrl);
    FIND(BIO_new);
    FIND(BIO_s_mem);
    FIND(BIO_read);
    FIND(BIO_write);
    FIND(BIO_ctrl_pending);
    FIND(ERR_get_error);
    FIND(ERR_error_string_n);
    FIND(ERR_clear_error);
    FIND(X509_verify_cert_error_string);
#undef FIND
    return whole ? ssl : nullptr;
  }();
  return loaded;
}

std::string LastError(const OpenSsl& ssl) {
  char text[256] = "";
  ssl.ERR_error_string_n(ssl.ERR_get_error(), text, sizeof(text));
  return text;
}

}  // namespace

std::unique_ptr<RedisTls> RedisTls::New(const std::string& host,
                                        const std::string& ca,
                                        std::string* error) {
  const OpenSsl* const ssl = Load();
  if (ssl == nullptr) {
    *error =
        "TLS needs OpenSSL 1.1 or 3 as libssl.so, which is not installed here; "
        "on Debian or Ubuntu: apt-get install libssl3";
    return nullptr;
  }
  ssl->ERR_clear_error();
  std::unique_ptr<RedisTls> tls(new RedisTls);
  tls->context_ = ssl->SSL_CTX_new(ssl->TLS_client_method());
  const bool trusts =
      ca.empty() ? ssl->SSL_CTX_set_default_verify_paths(tls->context_) == 1
                 : ssl->SSL_CTX_load_verify_locations(tls->context_, ca.c_str(),
                                                      nullptr) == 1;
  if (!trusts) {
    *error = "the certificates of `ca`, " + (ca.empty() ? "the system's" : ca) +
             ", cannot be read: " + LastError(*ssl);
    return nullptr;
  }
  ssl->SSL_CTX_set_verify(tls->context_, kVerifyPeer, nullptr);
  tls->ssl_ = ssl->SSL_new(tls->context_);
  tls->in_ = ssl->BIO_new(ssl->BIO_s_mem());
  tls->out_ = ssl->BIO_new(ssl->BIO_s_mem());
  ssl->SSL_set_bio(tls->ssl_, tls->in_, tls->out_);
  ssl->SSL_set1_host(tls->ssl_, host.c_str());
  ssl->SSL_ctrl(tls->ssl_, kSetHostName, 0, const_cast<char*>(host.c_str()));
  ssl->SSL_set_connect_state(tls->ssl_);
  return tls;
}

RedisTls::~RedisTls() {
  if (ssl_ != nullptr) Load()->SSL_free(ssl_);
  if (context_ != nullptr) Load()->SSL_CTX_free(context_);
}

bool RedisTls::Handshake(bool* done, std::string* error) {
  const OpenSsl& ssl = *Load();
  ssl.ERR_clear_error();
  const int result = ssl.SSL_do_handshake(ssl_);
  *done = result == 1;
  if (*done || ssl.SSL_get_error(ssl_, result) == kErrorWantRead) return true;
  const long verified = ssl.SSL_get_verify_result(ssl_);
  *error =
      "the TLS handshake failed: " +
      (verified == kVerified ? LastError(ssl)
                             : ssl.X509_verify_cert_error_string(verified));
  return false;
}

void RedisTls::Write(const std::string& plain) {
  // Into memory: nothing to wait for. A fault shows when reading.
  for (size_t at = 0; at < plain.size();) {
    const auto size =
        static_cast<int>(std::min<size_t>(plain.size() - at, INT_MAX));
    const int n = Load()->SSL_write(ssl_, plain.data() + at, size);
    if (n <= 0) return;
    at += static_cast<size_t>(n);
  }
}

std::string RedisTls::TakeOutput() {
  std::string wire(Load()->BIO_ctrl_pending(out_), '\0');
  if (!wire.empty()) {
    Load()->BIO_read(out_, wire.data(), static_cast<int>(wire.size()));
  }
  return wire;
}

void RedisTls::Feed(const char* wire, size_t size) {
  Load()->BIO_write(in_, wire, static_cast<int>(size));
}

long RedisTls::Read(char* plain, size_t size) {
  const OpenSsl& ssl = *Load();
  ssl.ERR_clear_error();
  const int n = ssl.SSL_read(ssl_, plain,
                             static_cast<int>(std::min<size_t>(size, INT_MAX)));
  if (n > 0) return n;
  return ssl.SSL_get_error(ssl_, n) == kErrorWantRead ? 0 : -1;
}

}  // namespace qianmo
