#include "ops/cc/redis_connection.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <utility>

namespace qianmo {
namespace {

constexpr size_t kReadBytes = 1 << 16;
constexpr int64_t kMaxBulk = int64_t{512} << 20;  // Redis' own limit
constexpr int64_t kMaxParts = 1 << 24;

// Milliseconds to wait at most, rounded up.
int Left(RedisClock::time_point until) {
  const auto left = until - RedisClock::now();
  if (left <= left.zero()) return 0;
  return static_cast<int>(
      std::chrono::duration_cast<std::chrono::milliseconds>(left).count() + 1);
}

// Waits for one socket. False when the time is up.
bool Wait(int socket, short events, RedisClock::time_point until) {
  struct pollfd one = {socket, events, 0};
  while (true) {
    const int ready = poll(&one, 1, Left(until));
    if (ready > 0) return true;
    if (ready == 0 || errno != EINTR) return false;
  }
}

}  // namespace

void RedisReader::Expect(size_t replies) {
  read_ = end_ = 0;
  awaited_ = replies;
  parts_.clear();
}

char* RedisReader::Room(size_t* size) {
  if (buffer_.size() - end_ < kReadBytes) {
    buffer_.resize(std::max(2 * buffer_.size(), end_ + kReadBytes));
  }
  *size = buffer_.size() - end_;
  return buffer_.data() + end_;
}

bool RedisReader::Take(size_t size, std::string* error) {
  end_ += size;
  const auto refuse = [error] {
    *error = "what was received is no reply of a Redis";
    return false;
  };
  while (awaited_ > 0 && read_ < end_) {
    const char* const begin = buffer_.data() + read_;
    const auto* const line_end =
        static_cast<const char*>(std::memchr(begin, '\n', end_ - read_));
    if (line_end == nullptr) return end_ - read_ < kReadBytes || refuse();
    if (line_end - begin < 2 || line_end[-1] != '\r') return refuse();
    RedisPart part = {*begin, line_end - begin - 2, read_ + 1};
    size_t next = read_ + static_cast<size_t>(line_end - begin) + 1;
    if (part.type == ':' || part.type == '$' || part.type == '*') {
      const auto parsed = std::from_chars(begin + 1, line_end - 1, part.number);
      if (parsed.ec != std::errc() || parsed.ptr != line_end - 1) {
        return refuse();
      }
    } else if (part.type != '+' && part.type != '-') {
      return refuse();
    }
    if (part.type == '$') {
      if (part.number < -1 || part.number > kMaxBulk) return refuse();
      if (part.number >= 0) {
        const auto bytes = static_cast<size_t>(part.number);
        if (end_ - next < bytes + 2) return true;
        part.at = next;
        next += bytes + 2;
        if (std::memcmp(buffer_.data() + next - 2, "\r\n", 2) != 0) {
          return refuse();
        }
      }
    } else if (part.type == '*') {
      if (part.number < -1 || part.number > kMaxParts) return refuse();
      awaited_ += static_cast<size_t>(std::max<int64_t>(part.number, 0));
    }
    parts_.push_back(part);
    read_ = next;
    --awaited_;
  }
  return awaited_ > 0 || read_ == end_ || refuse();
}

std::unique_ptr<RedisConnection> RedisConnection::Open(
    const RedisAddress& address, const RedisAccess& access,
    RedisClock::time_point until, std::string* error) {
  std::unique_ptr<RedisConnection> made(new RedisConnection);
  if (!made->Connect(address, until, error)) return nullptr;
  if (access.tls && !made->StartTls(address, access, until, error)) {
    return nullptr;
  }
  if (access.password.empty()) return made;
  if (access.user.empty()) {
    made->Add({"AUTH", access.password});
  } else {
    made->Add({"AUTH", access.user, access.password});
  }
  Exchange({made.get()}, until);
  *error = made->error_;
  if (!error->empty()) return nullptr;
  const RedisPart& answer = made->reader_.parts()[0];
  if (answer.type == '+') return made;
  *error = "it refuses the password of QIANMO_REDIS_PASSWORD: " +
           std::string(made->reader_.text(answer));
  return nullptr;
}

RedisConnection::~RedisConnection() {
  if (socket_ >= 0) close(socket_);
}

bool RedisConnection::Connect(const RedisAddress& address,
                              RedisClock::time_point until,
                              std::string* error) {
  struct addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  struct addrinfo* found = nullptr;
  const std::string port = std::to_string(address.port);
  const int fault =
      getaddrinfo(address.host.c_str(), port.c_str(), &hints, &found);
  if (fault != 0) {
    *error = gai_strerror(fault);
    return false;
  }
  for (const struct addrinfo* at = found; at != nullptr; at = at->ai_next) {
    if (socket_ >= 0) close(socket_);
    socket_ =
        socket(at->ai_family, at->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC,
               at->ai_protocol);
    int state = 0;
    if (socket_ < 0) {
      state = errno;
    } else if (connect(socket_, at->ai_addr, at->ai_addrlen) != 0) {
      state = errno;
      if (state == EINPROGRESS) {
        socklen_t size = sizeof(state);
        if (!Wait(socket_, POLLOUT, until)) {
          state = ETIMEDOUT;
        } else if (getsockopt(socket_, SOL_SOCKET, SO_ERROR, &state, &size)) {
          state = errno;
        }
      }
    }
    error->assign(state == 0 ? "" : std::strerror(state));
    if (state == 0) break;
  }
  freeaddrinfo(found);
  if (!error->empty()) return false;
  const int on = 1;
  setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  setsockopt(socket_, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
  return true;
}

bool RedisConnection::StartTls(const RedisAddress& address,
                               const RedisAccess& access,
                               RedisClock::time_point until,
                               std::string* error) {
  tls_ = RedisTls::New(address.host, access.ca, error);
  if (tls_ == nullptr) return false;
  while (true) {
    bool done;
    const bool went_well = tls_->Handshake(&done, error);
    sending_ = tls_->TakeOutput();
    sent_ = 0;
    while (sent_ < sending_.size()) {
      Send();
      if (error_.empty() && sent_ < sending_.size() &&
          !Wait(socket_, POLLOUT, until)) {
        error_ = "the TLS handshake took too long";
      }
      if (!error_.empty()) {
        if (went_well) *error = error_;
        return false;
      }
    }
    if (!went_well) return false;
    if (done) return true;
    char wire[4096];
    if (!Wait(socket_, POLLIN, until)) {
      *error = "the TLS handshake took too long";
      return false;
    }
    const ssize_t n = recv(socket_, wire, sizeof(wire), 0);
    if (n == 0) {
      *error = "it ended the TLS handshake; does its port speak TLS?";
      return false;
    }
    if (n > 0) tls_->Feed(wire, static_cast<size_t>(n));
  }
}

void RedisConnection::AddCommand(size_t count) {
  ++num_commands_;
  commands_ += '*';
  commands_ += std::to_string(count);
  commands_ += "\r\n";
}

void RedisConnection::AddWord(std::string_view word) {
  char size[24] = "$";
  char* const end = std::to_chars(size + 1, size + 20, word.size()).ptr;
  std::memcpy(end, "\r\n", 2);
  commands_.append(size, static_cast<size_t>(end + 2 - size));
  commands_.append(word);
  commands_.append("\r\n", 2);
}

void RedisConnection::Add(std::initializer_list<std::string_view> command) {
  AddCommand(command.size());
  for (const std::string_view word : command) AddWord(word);
}

void RedisConnection::Begin() {
  reader_.Expect(std::exchange(num_commands_, 0));
  sent_ = 0;
  if (tls_ != nullptr) {
    tls_->Write(commands_);
    sending_ = tls_->TakeOutput();
  } else {
    sending_.swap(commands_);
  }
  commands_.clear();
  Send();
}

void RedisConnection::Send() {
  while (sent_ < sending_.size()) {
    const ssize_t n = send(socket_, sending_.data() + sent_,
                           sending_.size() - sent_, MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EAGAIN || errno == EINTR) return;
      error_ = std::strerror(errno);
      return;
    }
    sent_ += static_cast<size_t>(n);
  }
}

void RedisConnection::Receive() {
  while (is_busy()) {
    char wire[1 << 14];
    size_t size = sizeof(wire);
    char* const to = tls_ == nullptr ? reader_.Room(&size) : wire;
    const ssize_t n = recv(socket_, to, size, 0);
    if (n < 0) {
      if (errno != EAGAIN && errno != EINTR) error_ = std::strerror(errno);
      return;
    }
    if (n == 0) {
      error_ = "it closed the connection";
      return;
    }
    if (tls_ == nullptr) {
      reader_.Take(static_cast<size_t>(n), &error_);
    } else {
      tls_->Feed(wire, static_cast<size_t>(n));
      long plain = 1;
      while (is_busy() && plain > 0) {
        size_t room;
        char* const text = reader_.Room(&room);
        plain = tls_->Read(text, room);
        if (plain > 0) reader_.Take(static_cast<size_t>(plain), &error_);
        if (plain < 0) error_ = "it closed the connection";
      }
    }
    if (static_cast<size_t>(n) < size) return;
  }
}

void RedisConnection::Exchange(const std::vector<RedisConnection*>& all,
                               RedisClock::time_point until) {
  for (RedisConnection* const one : all) one->Begin();
  std::vector<RedisConnection*> busy;
  std::vector<struct pollfd> sockets;
  while (true) {
    busy.clear();
    sockets.clear();
    for (RedisConnection* const one : all) {
      if (!one->is_busy()) continue;
      const bool sends = one->sent_ < one->sending_.size();
      busy.push_back(one);
      sockets.push_back({one->socket_,
                         static_cast<short>(POLLIN | (sends ? POLLOUT : 0)),
                         0});
    }
    if (busy.empty()) return;
    const int left = Left(until);
    const int ready = poll(sockets.data(), sockets.size(), left);
    if (ready < 0 && errno == EINTR) continue;
    for (size_t i = 0; i < busy.size(); ++i) {
      if (ready <= 0) {
        busy[i]->error_ = "it gave no answer in time";
        busy[i]->late_ = true;
      } else if (sockets[i].revents != 0) {
        if ((sockets[i].revents & POLLOUT) != 0) busy[i]->Send();
        if ((sockets[i].revents & ~POLLOUT) != 0) busy[i]->Receive();
      }
    }
  }
}

}  // namespace qianmo
