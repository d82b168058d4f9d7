// TLS for a connection to Redis.

#ifndef QIANMO_OPS_CC_REDIS_TLS_H_
#define QIANMO_OPS_CC_REDIS_TLS_H_

#include <cstddef>
#include <memory>
#include <string>

namespace qianmo {

// The client's end of one TLS connection, between plain bytes and those on the
// wire; it touches no socket. OpenSSL is loaded on first use and is no
// dependency of this library.
class RedisTls {
 public:
  // The peer must show a certificate for `host` that an authority of the file
  // `ca` has signed, or one of the system's where that is empty. Returns null
  // and an error when there is no OpenSSL, or no such file.
  static std::unique_ptr<RedisTls> New(const std::string& host,
                                       const std::string& ca,
                                       std::string* error);
  RedisTls(const RedisTls&) = delete;
  RedisTls& operator=(const RedisTls&) = delete;
  ~RedisTls();

  // Goes on with the handshake. Returns false and an error when it failed.
  bool Handshake(bool* done, std::string* error);

  void Write(const std::string& plain);
  // What is to be sent; it is forgotten here.
  std::string TakeOutput();
  // Takes what was received.
  void Feed(const char* wire, size_t size);
  // Plain bytes of it: how many, 0 for none yet, -1 at the end or for a fault.
  long Read(char* plain, size_t size);

 private:
  RedisTls() = default;

  void* context_ = nullptr;  // SSL_CTX
  void* ssl_ = nullptr;      // SSL
  void* in_ = nullptr;       // BIO; ssl_ owns both
  void* out_ = nullptr;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_REDIS_TLS_H_
